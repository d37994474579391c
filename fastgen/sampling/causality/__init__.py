"""When each element can be computed: ready times, the drawing order, and the report of leaks."""
