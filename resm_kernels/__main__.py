"""`python -m resm_kernels`: the command-line interface."""

from resm_kernels.cli import main

if __name__ == "__main__":
    main()
