#!/usr/bin/env python3
"""Record which experts a model chooses for a text, token by token, as if it had written it.

  record_routes.py MODEL TEXT... -o OUT.trace
  localv4 tune OUT.trace --json

Files of TEXT follow one upon the other in one sequence, so that the subject changes between them.
The context starts anew every --window tokens.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from localv4.engine.engine import Engine
from localv4.engine.route_log import record_routes
from localv4.storage import open_checkpoint


def main() -> None:
    """Read the command line and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=4000, help="of each text, at most")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    engine = Engine.load(options.model)
    ids: list[int] = []
    for path in options.texts:
        text = path.read_text(encoding="utf-8")
        ids += engine.tokenizer.encode(text)[: options.tokens]
    session = engine.new_session()
    with (
        open_checkpoint(options.model) as checkpoint,
        record_routes(engine.network, checkpoint, options.model.name, options.out),
    ):
        for number, token in enumerate(ids):
            if number and number % options.window == 0:
                session = engine.new_session()
            session.extend([token])
    sys.stdout.write(f"{options.out}: {len(ids)} tokens\n")


if __name__ == "__main__":
    main()
