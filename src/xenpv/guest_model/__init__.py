"""A PV kernel in process, which runs on the model host: it publishes a p2m, balloons, suspends and resumes."""
