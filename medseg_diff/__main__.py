from medseg_diff.cli import main

main()
