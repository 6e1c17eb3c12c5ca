package lab

// Unqueued makes cfg's lab run without waiting for others to end.
func Unqueued(cfg Config) Config {
	cfg.unqueued = true
	return cfg
}
