"""`python -m fastllama` is the `fastllama` command."""

from fastllama.cli.main import main

raise SystemExit(main())
