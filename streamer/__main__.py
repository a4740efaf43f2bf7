"""Run the command line as ``python -m streamer``."""

from streamer.cli.main import main

if __name__ == "__main__":
    main()
