"""What a finished run is worth: suites of measures, each a file in its `evaluation/`."""
