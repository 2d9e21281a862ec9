"""Expert paging: which records of experts are in memory, and how the others get there."""
