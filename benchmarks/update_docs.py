"""Put the tables and plots of all kept results into `docs/performance.md`."""

import sys
from pathlib import Path

from lorascope.bench.table import update_document
from lorascope.errors import LorascopeError

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Update the document, and say from what."""
    results = sorted((ROOT / "benchmarks" / "results").glob("*/bench.json"))
    try:
        update_document(ROOT / "docs" / "performance.md", results)
    except LorascopeError as error:
        print(f"update_docs: {error}", file=sys.stderr)
        return error.exit_code
    print(*(f"updated from {path.relative_to(ROOT)}" for path in results), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
