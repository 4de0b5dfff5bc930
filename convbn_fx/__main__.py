"""`python -m convbn_fx` is `convbn-fx`."""

import sys


def main() -> None:
    """Runs the command line, or says what it needs."""
    try:
        from convbn_fx.cli import app
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"convbn-fx: the command line needs {error.name}, which comes with: pip install 'convbn-fx[cli,zoo]'\n"
        )
        sys.exit(2)
    app(prog_name="convbn-fx")


if __name__ == "__main__":
    main()
