"""Libraries that run predictive models, one file each, behind `predictive.ports.Backend`."""
