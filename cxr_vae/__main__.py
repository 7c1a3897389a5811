"""Lets `python -m cxr_vae` and `torchrun … -m cxr_vae` run the same commands as `cxr-vae`."""

import sys

from cxr_vae.cli import main

sys.exit(main())
