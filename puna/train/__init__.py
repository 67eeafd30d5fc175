"""One loop, objectives as pure functions, schedules, exact resume."""
