"""Benchmarks: one file per subject, peers side by side; ``mmbase bench SUBJECT`` runs one."""

SUBJECTS = {
    "loss": "the contrastive losses against OpenCLIP's and other kernels: time, peak memory, floor, error",
    "distributed_loss": "bytes sent and matrix FLOPs per rank beside OpenCLIP's, over gloo on this machine",
    "train_step": "one training step against OpenCLIP's: same towers, batch, precision and threads",
    "towers": "each tower's forward and backward against OpenCLIP's, captions of realistic lengths",
}
"""Modules of this package with a ``main()`` that reads ``sys.argv``, and what each measures."""
