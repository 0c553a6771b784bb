"""`python -m peft_psr.cli`: the `psr` command."""

from peft_psr.cli import main


main()
