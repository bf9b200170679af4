"""A domain's memory in the formats that other tools read: which bytes go where, sans-IO."""
