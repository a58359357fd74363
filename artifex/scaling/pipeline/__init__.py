"""Pipeline parallelism: schedules as tables, and one executor that runs any of them."""
