"""The simulator: routing facts replayed under the engine's policies, and priced on described hardware."""
