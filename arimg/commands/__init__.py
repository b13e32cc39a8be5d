"""One module per command, each with a click command named `command`; none imports torch at module level."""
