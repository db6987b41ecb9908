"""`deepspeed train.py --config configs/umdf_mosei.json`, or plain `python train.py ...`."""

import sys

from fastmmkd.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
