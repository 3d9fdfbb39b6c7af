"""python -m llmslim"""

import sys

from llmslim.cli import main

if __name__ == "__main__":
    sys.exit(main())
