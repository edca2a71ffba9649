"""The second study: a persona behind a trigger. Commands are here, their library in `persona`."""
