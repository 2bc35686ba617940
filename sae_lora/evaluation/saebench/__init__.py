"""SAEBench, in its own environment, because its pinned versions conflict with this package's."""
