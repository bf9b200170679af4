"""The command line: one file a family of verbs. It picks files and hosts; everything else is handed on."""
