"""From ready times to instructions: schedule, parts of convolutions, memory, programs."""
