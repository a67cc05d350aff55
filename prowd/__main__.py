"""The command `prowd`, as it is installed and as ``python -m prowd``."""

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        # Imported here: a missing or damaged package is then reported in one line.
        from prowd.cli import main as run
    except Exception as error:
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        print(f"prowd: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prowd: interrupted", file=sys.stderr)
        return 130
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
