// Command ttrpc_interop is containerd's own ttrpc as a counterpart for the Python library's tests.
//
//	ttrpc_interop server SOCKET          serves until its stdin ends
//	ttrpc_interop client SOCKET CHECK    runs one check against a server and exits with 0 when it holds
//
// The service, which the test implements in Python too, uses only well-known message types.
package main

import (
	"fmt"
	"os"
)

const service = "interop.Service"

func main() {
	var err error
	switch {
	case len(os.Args) == 3 && os.Args[1] == "server":
		err = serve(os.Args[2])
	case len(os.Args) == 4 && os.Args[1] == "client":
		err = check(os.Args[2], os.Args[3])
	default:
		err = fmt.Errorf("usage: %s server SOCKET | client SOCKET CHECK", os.Args[0])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
