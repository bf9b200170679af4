"""The only place where files, records and memory meet."""
