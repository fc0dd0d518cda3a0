"""`python -m sadmoe` is the command `sadmoe`."""

from sadmoe.cli import main

raise SystemExit(main())
