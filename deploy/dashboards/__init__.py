"""Grafana's dashboards, as code: python -m halfmoon.deploy.dashboards.write makes deploy/grafana/*.json of it."""
