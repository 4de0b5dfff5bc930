"""`python -m convbn_fx` is `convbn-fx`."""

import sys


def build() -> None:
    """Builds the operator in C++ where it is not built."""
    from convbn_fx.functional import native

    try:
        sys.stdout.write(f"{native.build(again=True)}\n")
    except native.BuildError as error:
        sys.stderr.write(f"convbn-fx: {error}\n")
        sys.exit(1)


def main() -> None:
    """Runs the command line, or says what it needs."""
    if sys.argv[1:] == ["build"]:  # needs nothing
        return build()
    try:
        from convbn_fx.cli.commands import app
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"convbn-fx: the command line needs {error.name}, which comes with: pip install 'convbn-fx[cli,zoo]'\n"
        )
        sys.exit(2)
    app(prog_name="convbn-fx")
    return None


if __name__ == "__main__":
    main()
