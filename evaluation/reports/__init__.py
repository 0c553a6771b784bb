"""What a benchmark has to say: tables with intervals, figures, pages."""
