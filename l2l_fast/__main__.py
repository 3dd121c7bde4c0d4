"""``python -m l2l_fast`` says what works on this machine; with arguments it is ``l2l-fast``."""

import sys

from l2l_fast.cli import main

if __name__ == "__main__":
    main(sys.argv[1:] or ["info"])
