"""The paper: plan, schedule, noise, samplers. Pure: no processes, no clock."""
