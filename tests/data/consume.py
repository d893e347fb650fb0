"""Reads batches and writes what was in them, a line per batch, until it has read enough or is killed.

python consume.py OUTPUT UNTIL OPTIONS_AS_JSON
"""

import hashlib
import json
import sys
from pathlib import Path


def rows_of(batch):
    """Key and digest of pixels, tokens and draw of every sample of a batch."""
    rows = []
    for row, key in enumerate(batch["key"]):
        content = b"".join(batch[name][row].contiguous().numpy().tobytes() for name in ("image", "text", "draw"))
        rows.append([key, hashlib.blake2b(content, digest_size=8).hexdigest()])
    return rows


if __name__ == "__main__":
    from mmbase.data import loader
    from mmbase.data.tokenizer import FileTokenizer

    options = json.loads(sys.argv[3])
    tokenizer = FileTokenizer(options.pop("tokenizer"), context_length=12)
    stream = loader(tokenizer=tokenizer, **options)
    with Path(sys.argv[1]).open("a") as output:
        while stream.position < int(sys.argv[2]):
            batch = next(stream)
            output.write(json.dumps({"position": stream.position, "rows": rows_of(batch)}) + "\n")
            output.flush()
    stream.close()
