"""A model of a session, plans of what may happen to one, and players that carry plans out on a real one."""
