"""A PV kernel for the model: publishes a p2m, balloons, suspends, resumes."""
