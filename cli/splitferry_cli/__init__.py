"""The `splitferry` command."""
