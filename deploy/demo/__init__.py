"""The whole system on one machine, for a minute or for as long as one likes to watch: `deploy.demo.run`."""
