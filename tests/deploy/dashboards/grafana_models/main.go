// Reads a JSON list of alert rules on stdin, and holds each to Grafana's own model: unknown fields are refused.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"

	"github.com/go-openapi/strfmt"
	"github.com/grafana/grafana-openapi-client-go/models"
)

func main() {
	var rules []json.RawMessage
	if err := json.NewDecoder(os.Stdin).Decode(&rules); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	for _, raw := range rules {
		decoder := json.NewDecoder(bytes.NewReader(raw))
		decoder.DisallowUnknownFields()
		var rule models.ProvisionedAlertRule
		if err := decoder.Decode(&rule); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		if err := rule.Validate(strfmt.Default); err != nil {
			fmt.Fprintln(os.Stderr, rule.UID, err)
			os.Exit(1)
		}
	}
	fmt.Println(len(rules))
}
