"""From measurements to contrasts, intervals, corrections and verdicts: numbers in, numbers out."""
