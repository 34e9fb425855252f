"""The embedded world: scenes, their renderer and texts, exact checkers, metrics. With real data, skip this package."""
