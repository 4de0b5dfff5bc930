"""`python -m convbn_fx` is `convbn-fx`."""

import sys


def main() -> None:
    """Runs the command line, or says what it needs.

    Raises:
        SystemExit: Always: with the command's exit status.
    """
    try:
        from convbn_fx.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "convbn_fx":
            raise
        sys.exit(
            f"convbn-fx: the command line needs {error.name}, which comes with: pip install 'convbn-fx[cli,zoo]'"
        )
    app(prog_name="convbn-fx")


if __name__ == "__main__":
    main()
