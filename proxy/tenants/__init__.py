"""Who may use the clients' ports, and how much: API keys, the tenants that they are of, their limits."""
