"""python -m alignprune_exp.curate"""

import sys

from .command import main

sys.exit(main(sys.argv[1:]))
