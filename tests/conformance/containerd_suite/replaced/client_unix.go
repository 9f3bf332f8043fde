//go:build !windows

// Takes the place of the suite's file of this name: its daemon lives in a directory of the caller's choice.

package client

import "os"

var (
	defaultRoot    = os.Getenv("CONFORMANCE_HOME") + "/root"
	defaultState   = os.Getenv("CONFORMANCE_HOME") + "/state"
	defaultAddress = os.Getenv("CONFORMANCE_HOME") + "/containerd.sock"
)
