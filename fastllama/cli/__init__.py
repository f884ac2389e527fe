"""The `fastllama` command: one file per subcommand; heavy packages are imported only when one runs."""
