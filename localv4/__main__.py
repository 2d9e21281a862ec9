"""`python -m localv4` is the same as the `localv4` command."""

from localv4.cli.main import main

if __name__ == "__main__":
    main()
