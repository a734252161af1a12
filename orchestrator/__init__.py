"""Driver side: grids, plans, scheduling, the store and its projections. Never imports torch."""
