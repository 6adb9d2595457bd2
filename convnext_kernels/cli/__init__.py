"""The subcommands of the command line, one file each, and what they share."""
