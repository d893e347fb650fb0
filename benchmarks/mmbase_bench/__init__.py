"""Benchmarks: one file per subject, peers side by side; ``mmbase bench SUBJECT`` runs one."""

SUBJECTS = {
    "loss": "the contrastive losses against OpenCLIP's and other kernels: time, peak memory, floor, error",
    "distributed_loss": "bytes sent and matrix FLOPs per rank beside OpenCLIP's, over gloo on this machine",
    "attention": "self-attention on the packed projection against each of PyTorch's ways, pinned one by one",
    "layer_norm": "residual addition with LayerNorm, activation with bias, head: against eager and compiled lines",
    "block": "a whole transformer block against OpenCLIP's, eager and compiled, with the same weights",
    "loader": "samples per second beside OpenCLIP's own pipeline, in its own process, on the same shards of JPEGs",
    "tokenizer": "captions per second of CLIP's tokenizer beside OpenCLIP's, with equal ids",
    "data_faults": "epochs from nginx and S3 behind a proxy that cuts, stalls and lies: the same samples or not",
    "train_step": "one training step against OpenCLIP's: same towers, batch, precision and threads",
    "towers": "each tower's forward and backward against OpenCLIP's, captions of realistic lengths",
}
"""Modules of this package with a ``main()`` that reads ``sys.argv``, and what each measures."""
