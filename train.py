"""`deepspeed train.py --config configs/umdf_mosei.json`, or plain `python train.py ...`."""

import os
import sys

from fastmmkd.cli import train_main

if __name__ == "__main__":
    code = train_main()
    # Everything is written and closed. Gloo's threads may still hold Python objects: letting go of them while the
    # interpreter shuts down aborts the process now and then (pytorch/pytorch#179291), so it does not shut down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
