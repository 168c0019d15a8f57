"""Grafana's dashboards and the alerts, from code.

    objectives  what is promised: each bound once
    panels      how a dashboard is said, and its JSON
    boards, model_boards    what the six dashboards show
    alerts      the alerts, for Prometheus and for Grafana
    files       all of it as files
    grafana     all of it onto a server: plan, push
    validate    every query of it asked of a Prometheus
    addresses   of servers, as users give them

The SDK is imported when JSON is made, not before.
"""
